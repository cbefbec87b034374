"""Block swap: frozen blocks that wait in main memory and come to the card while others compute."""
