"""A map of rows that no format knows."""


def both_ways(row):
    """Two rows of each; none of an empty one."""
    if not row["en"]:
        return None
    return [{"prompt": row["en"], "response": row["zh"]}, {"prompt": row["zh"], "response": row["en"]}]
