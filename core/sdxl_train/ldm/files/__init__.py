"""Files of LoRA-family networks: what is in them, whatever wrote them."""
