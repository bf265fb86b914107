"""What models write, and who is asked to write: teachers, their answers, and what a model writes unasked."""
