"""Why a row is as fast as it is."""
