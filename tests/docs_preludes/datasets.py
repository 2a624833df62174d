from pathlib import Path

import docs_hub

docs_hub.serve()
docs_hub.publish()
prompts, labels = docs_hub.PROMPTS, [1, 1, 0, 0, 0]
import actcache as ac

ac.UnifiedCache("gpt2").warmup(prompts)
Path("prompts.csv").write_text("prompt,truth\n" + "".join(f'"{text}",1\n' for text in prompts))
