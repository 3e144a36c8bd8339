"""What is sent: settings, stages of requests, prompts, and public traces."""
