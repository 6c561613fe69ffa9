"""Which visual tokens methods keep of clips, and answers attend to, also as pictures."""
