"""What makes token shards for training out of text, JSONL, HTML files and WARC archives."""
