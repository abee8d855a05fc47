"""The data set that the project makes: questions on pictures and on speech, and what they are asked of."""
