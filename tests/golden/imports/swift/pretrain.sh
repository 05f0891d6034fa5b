#!/usr/bin/env bash
export CUDA_VISIBLE_DEVICES=0
MODEL=Qwen/Qwen2.5-0.5B
nproc_per_node=1

swift pt --model $MODEL --train_type full --use_hf true \
    --dataset ../data/texts.jsonl --packing true --attn_impl flash_attn --max_length 8192 \
    --max_steps 1000 --learning_rate=1e-5 --deepspeed zero2 && echo done
