"""What the cuts cost, side by side with what public tools make of the same model and text.

cuts             which widths are removed, and which methods are asked to remove them
memory           peak resident memory of a process
baselines        other libraries, each run as its own documentation says
row              one cut by one method in a process of its own: make, save, reload, measure
table            all rows in one run, as CSV and Markdown
cost             what scoring, gathering and the command line cost in time and memory
curve            what a curve costs over its evaluations and repairs, and auto over one granularity
prediction       how far predicted perplexity is from what is then measured
pages            how fast the live Compress page answers, in a browser
importance_page  how long the Importance page of a large model takes, in a browser
load             ten visitors at once on one server
"""
