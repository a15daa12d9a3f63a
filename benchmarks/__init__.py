"""Measurements that take too long for tests: quality beside other tools, time, memory and load.

cuts             the cuts of the table and the methods that make them
memory           peak resident memory of a process
baselines        other libraries, each run as its own documentation says
row              one cut by one method in its own process: make, save, reload, measure
table            all rows in one run, as CSV and Markdown
cost             time of scoring and of gathering second moments; memory of the command line
curve            time of a curve beside its evaluations and repairs, and of auto
prediction       error of predicted perplexity
pages            response time of the live Compress page, in a browser
importance_page  time to draw the Importance page of a large model, in a browser
load             ten visitors at the same time on one server
recover          training of a cut: losses against tokens, methods, losses and caches
families         models of every family, trained for a minute, cut and checked
gguf_frontier    size, perplexity and speed of GGUF files, dense and pruned, in llama.cpp
"""
