"""The length predictor against recorded answers: `make lengths`."""
