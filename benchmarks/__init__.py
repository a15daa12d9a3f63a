"""What the cuts cost, side by side with what public tools make of the same model and text.

cuts        which widths are removed, and which methods are asked to remove them
baselines   other libraries, each run as its own documentation says
row         one cut by one method in a process of its own: make, save, reload, measure
table       all rows in one run, as CSV and Markdown
cost        what scoring, gathering and the command line cost in time and memory
"""
