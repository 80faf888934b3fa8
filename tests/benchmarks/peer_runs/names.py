"""What a peer's script and the one who asks it agree on."""

ANSWER = "peer answer: "
