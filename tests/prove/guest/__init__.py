"""What is done to a network share, and what makes it so inside user-mode Linux."""
