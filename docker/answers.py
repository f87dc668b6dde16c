"""End well if the coordinator's gate answers over TLS, and SuperLink behind it: `python answers.py CA.crt PORT`."""

import ssl
import sys
import urllib.error
import urllib.request

ca, port = sys.argv[1:]
request = urllib.request.Request(f"https://127.0.0.1:{port}/v1/fleet/activate-node", b"", method="POST")
trust = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=ca))
try:
    urllib.request.build_opener(urllib.request.ProxyHandler({}), trust).open(request, timeout=5)
except urllib.error.HTTPError as refusal:
    sys.exit(refusal.code >= 500)  # SuperLink refuses what is no SuperNode's; that it is not reached is the gate's 502
sys.exit(1)
