from actcache.testing.tiny import tiny_model, tiny_tokenizer

tiny_model("llama").save_pretrained("path/or/hub-id")
tiny_tokenizer().save_pretrained("path/or/hub-id")
