"""Tables and plots of the documents from the results of the benchmarks: `python -m benchmarks.report`."""
