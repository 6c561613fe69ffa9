"""What became of each visual token while a question was answered, as data and as pictures."""
