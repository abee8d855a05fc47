"""What is said about an image: places in a grid, questions and answers, and how right answers are."""
