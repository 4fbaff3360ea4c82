"""Check a server against the contract of the SMS API.

    python -m examples.conformance --url https://sms.example.com --key trk_… --list-number +18005551000

Good messages are really queued: use an account whose messages are not delivered. A run sends about 1,100 of them.
Exit status: 0 if all rules hold, 1 if one is broken, 2 if the server cannot be reached.
"""

import argparse
import os
import sys
from urllib.parse import urlsplit

from examples.conformance.cases import CASES
from examples.conformance.target import Broken, Target

KEY_VARIABLE = "SMS_API_KEY"


def check(name: str, target: Target) -> str:
    """Return "holds", "skipped: …" or "broken: …" for the case of that name. Raises OSError without a connection."""
    if name == "foreign_list" and not target.foreign_list_number:
        return "skipped: give --foreign-list-number"
    try:
        CASES[name].check(target)
    except Broken as error:
        return f"broken: {error}"
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        return f"broken: the answer does not have the form of the contract ({type(error).__name__}: {error})"
    return "holds"


def is_url(text: str) -> bool:
    """Return True for the URL of a server, in characters that a request can carry."""
    try:
        url = urlsplit(text)
        is_complete = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # of a bad port or host
        return False
    return is_complete and text.isascii() and text.isprintable() and " " not in text


def main() -> int:
    """Run all cases, and print a line for each."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.conformance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True, help="URL of the server, before /api/v2")
    parser.add_argument("--key", default=os.environ.get(KEY_VARIABLE), help=f"API key; default: ${KEY_VARIABLE}")
    parser.add_argument("--list-number", required=True, help="an active sending list of the account")
    parser.add_argument("--foreign-list-number", default="", help="an active sending list of another account")
    options = parser.parse_args()
    if not is_url(options.url):
        parser.error("--url is a URL in ASCII that begins with http:// or https://")
    if not options.key:
        parser.error(f"give --key, or set {KEY_VARIABLE}")
    if not (options.key.isascii() and options.key.isprintable()):
        parser.error("the API key has a character that no header can carry")
    target = Target(options.url, options.key, options.list_number, options.foreign_list_number)
    broken = 0
    for name, (rule, _) in CASES.items():
        try:
            result = check(name, target)
        except OSError as error:
            print(f"{options.url}: {error}", file=sys.stderr)
            return 2
        broken += result.startswith("broken")
        print(f"{name:30} {result}\n    {rule}")
    print(f"{len(CASES)} rules, {broken} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
