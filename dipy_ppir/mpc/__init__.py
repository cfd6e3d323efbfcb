"""Computation between three parties that show each other nothing but the result.

Two of them own data and the third helps; or three or more sites make sums, without a
helper. This package knows nothing of images. What
programs use that take part in sessions or read receipts is public and annotated:

`Session`
    one party's end of a computation. `Session.load` meets the parties of a session
    file, `Session.open` is the one function that opens values, `Session.receipt` ends
    a run.
`PairSession`
    one owner's end of a session of two owners alone.
`SumSession`
    one site's end of a session in which three or more sites add up what they have.
`SessionFile`, `PlanFile`, `Party`
    what the parties agreed on before they connect, as it was read.
`Identity`, `create_identity`, `signed_by`
    a party's key and certificate, and what it signed.
`Ledger`, `Declaration`, `declare`
    what was opened to whom, what may be, and party numbers (`MOVING`, `STATIC`,
    `HELPER`) with the names of their roles (`ROLES`).
`SharedArray`, `OwnedArray`
    what goes into `Session.open`.
`receipt_text`, `make_receipt`
    the receipt in words, and how it is made.
`common_part`, `common_digest`, `array_hash`, `file_hash`
    what makes it a record.
`errors`
    what can go wrong between parties.

They are imported from their modules (`PUBLIC` says which), so that a party that needs
few of them starts quickly. The other modules are protocols, the arithmetic under them
and the network: they may change between versions, and sites compare the source before
they compute.
"""

#: What is public, by module.
PUBLIC = {
    "session": ("Session",),
    "pair": ("PairSession",),
    "sums": ("SumSession",),
    "sessionfile": ("SessionFile", "Party"),
    "planfile": ("PlanFile",),
    "identity": ("Identity", "create_identity", "signed_by"),
    "ledger": (
        "MOVING",
        "STATIC",
        "HELPER",
        "ROLES",
        "Ledger",
        "Declaration",
        "declare",
    ),
    "arrays": ("SharedArray", "OwnedArray"),
    "receipt": ("receipt_text", "make_receipt"),
    "record": ("common_part", "common_digest", "array_hash", "file_hash"),
    "errors": (
        "MPCError",
        "AfterTheEnd",
        "InsecureSetupError",
        "IdentityError",
        "SessionFileError",
        "DealError",
        "PeerError",
        "PeerLostError",
        "PeerTimeoutError",
        "PeerAbortedError",
        "ProtocolError",
        "AuthenticationError",
        "CertificateError",
        "OutOfStepError",
        "ParameterMismatchError",
        "FixedPointOverflowError",
        "NoiseBudgetError",
        "RoundingError",
        "UndeclaredOpeningError",
    ),
}
