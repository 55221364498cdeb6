"""What is done with a trained model, one command each."""
