"""What an attacker would try, and what may happen to a program, through what a user has."""
