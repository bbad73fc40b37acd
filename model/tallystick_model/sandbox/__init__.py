"""What a stranger's tokenizer and chat template may do: run in a process of their own, with limits. No torch here."""
