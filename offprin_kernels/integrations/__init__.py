"""MaskedAdamW in other people's trainers. Nothing here is imported unless asked for."""
