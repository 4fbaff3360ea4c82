"""The benchmarks: one file per question, run through `scripts/bench`. README.md says what each figure means.

    stages    what does each step on a batch's way cost, and does each trick earn its keep?
    limit     how fast is the broker itself?
    compare   how near to that limit is the gateway, and how far from an ordinary service?
    memory    what does it hold, idle and at 64 concurrent 5 MB requests?
    load      what does a deployment stand? (the operators' own, too)
    capacity  what do 50 million messages a minute take?

Below the questions: traffic.py (what is sent), generator.py (HTTP) and publisher.py (AMQP), which run as processes
of their own, started by workers.py; stand.py and systems.py (what is measured), processes.py (what it costs).
"""
