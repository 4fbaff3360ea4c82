"""The contract of the SMS API as black-box cases, for any server that implements it."""
