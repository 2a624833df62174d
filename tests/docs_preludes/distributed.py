import json
from pathlib import Path

import docs_bucket
import docs_hub

docs_bucket.serve()
docs_hub.serve()
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi

pq.write_table(pa.table({"text": [f"{i} is a number." for i in range(20)]}), "prompts.parquet")
HfApi().create_repo("org/prompts", repo_type="dataset")
HfApi().upload_file(
    path_or_fileobj="prompts.parquet", path_in_repo="data/0.parquet", repo_id="org/prompts", repo_type="dataset"
)
Path("prompts.jsonl").write_text("".join(json.dumps(f"Prompt {i}") + "\n" for i in range(20)))
