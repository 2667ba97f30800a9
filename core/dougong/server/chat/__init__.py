"""What every chat API is turned into (`ChatTurn`), and the events that every answer is made from."""
