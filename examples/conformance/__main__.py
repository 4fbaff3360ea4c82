"""Check a server against the contract of the SMS API.

    python3 -m examples.conformance --url https://sms.example.com --key trk_… --list-number +18005551000

Good messages are really queued: use an account whose messages are not delivered. A run sends about 1,100 of them.
Exit status: 0 if no rule is broken, 1 if one is, 2 if the server cannot be reached, or for unusable options, such as a
key that the server does not accept.
"""

import argparse
import http.client
import json
import os
import sys
from collections import Counter
from urllib.parse import urlsplit

from examples.conformance.cases import CASES
from examples.conformance.target import BULK, Broken, Target

KEY_VARIABLE = "SMS_API_KEY"
UNUSABLE_LISTS = {"list_not_found", "invalid_list_number", "missing_list_number"}


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


def refusal(target: Target) -> str:
    """Return a sentence about the option with which no rule can be checked; "" if there is none. Raises OSError.

    It sends a dry run: one message, which is not queued.
    """
    try:
        answer, body = target.exchange({"messages": [target.message()], "dry_run": True})
    except http.client.HTTPException as error:
        return f"--url: no HTTP answer: {type(error).__name__} {error}"
    match answer.status:
        case 401:
            return "--key: the server answers 401: it does not accept this API key"
        case 403:
            return "--key: the server answers 403: it refuses the account of this API key"
        case 404:
            return f"--url: the server answers 404 to {target.url.path.rstrip('/')}{BULK}: give its URL before /api/v2"
    try:
        code = json.loads(body)["errors"][0]["code"]
    except (IndexError, KeyError, TypeError, ValueError, RecursionError):
        return ""
    return f"--list-number: {target.list_number!r} is refused: {code}" if code in UNUSABLE_LISTS else ""


def is_url(text: str) -> bool:
    """Return True for the URL of a server, in characters that a request can carry."""
    try:
        url = urlsplit(text)
        is_complete = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # of a bad port or host
        return False
    return is_complete and text.isascii() and text.isprintable() and " " not in text


def parse_options() -> argparse.Namespace:
    """Return the options; end with exit status 2 if they are unusable."""
    parser = argparse.ArgumentParser(
        prog="python3 -m examples.conformance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    if options.foreign_list_number == options.list_number:
        parser.error("--foreign-list-number is that of another account, not --list-number")
    return options


def check_all(target: Target) -> int:
    """Run all cases, print a line for each, and return the number of broken rules. Raises OSError."""
    results = Counter[str]()
    for name, (rule, _) in CASES.items():
        result = check(name, target)
        results[result.partition(":")[0]] += 1
        print(f"{name:30} {result}\n    {rule}")
    print(f"{len(CASES)} rules, {results['broken']} broken, {results['skipped']} skipped")
    return results["broken"]


def main() -> int:
    """Check the options with one message, run all cases, and return the exit status."""
    options = parse_options()
    target = Target(options.url, options.key, options.list_number, options.foreign_list_number)
    try:
        if refused := refusal(target):
            print(f"error: {refused}", file=sys.stderr)
            return 2
        return 1 if check_all(target) else 0
    except OSError as error:
        print(f"{options.url}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
