"""int8: calibration data, recipes, one file per format, and the search for layers that must stay in float."""
