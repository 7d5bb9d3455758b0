"""What is done with the networks: :mod:`gspn.tasks.classify` trains, evaluates and applies classifiers."""
