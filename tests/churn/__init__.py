"""Services, tasks, agents, name servers and links come and go at random, and no host goes on to serve what is over.

`python -m tests.churn --seed 7 --steps 2000 --services 50 --tasks 10 --hosts 5`
"""
