"""Where networks come from: libraries, files, hubs and weights; and the search for stages in them."""
