"""The clinic over HTTP: thin routes over the stores."""
