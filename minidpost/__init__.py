"""DPO-augmented self-training (Wang, Li, Lu, ACL 2024, arXiv 2407.18248), written out in PyTorch."""
