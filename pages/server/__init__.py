"""What serves the pages: jobs, visitors, open models, settings, access, uploads. Draws nothing."""
