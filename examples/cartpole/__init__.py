"""A deep Q-network balances a pole; environment, memory and learner are one object of Variables."""
