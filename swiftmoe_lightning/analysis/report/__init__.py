"""Reports: a run or a plan as an HTML page, a picture, or a table in the terminal."""
