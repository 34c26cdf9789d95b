"""The control plane. Importing it first pins every TLS connection of this process to TLS 1.3."""

import os

# grpcio has no option for the lowest TLS version, but it reads its TLS 1.2 cipher list from this variable, once,
# when `grpc` is imported: hence here, in the package that every entry point imports first. A list whose only
# entry needs a pre-shared key, which nobody has, leaves TLS 1.2 without a usable cipher. TLS 1.3 has its own,
# fixed suites. `security.peers` refuses anything else once more, should this ever come too late.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-PSK-CHACHA20-POLY1305"
# Failed handshakes and lost peers are reported by us; gRPC's own lines on standard error would be noise.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
