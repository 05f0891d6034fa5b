"""One harness that times this project and its peers on the same work, in one run and in turn."""
