"""Networks. One file per part of K-Net; a further method gets a folder of its own."""
