"""The benchmarks, run through `scripts/bench`. README.md explains the commands and their figures.

    questions/  one module per command: the options, the measurement, the report
    drivers/    the load generator, the bare publisher, the FastAPI service, the servers, and one run of one system
    report/     figures, tables, plots, the HTML page and the terminal output

Imports go one way: `questions` imports `drivers` and `report`. Those two import neither `questions` nor each other.
"""
