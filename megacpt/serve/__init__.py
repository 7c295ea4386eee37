"""Running a model that was written for use: packed folders, decoded token by token, without the training engine."""
