"""What every module may use: files, seeds, devices, intervals, progress."""
