"""What a DiracX server needs around it, in one file, for tests on the loopback interface only.

    dirac-server.py serve PORT DIR            DiracX itself, in the environment that `dirac` sets
    dirac-server.py s3 PORT DIR               a store that knows what sandboxes need of S3
    dirac-server.py idp PORT CLIENT SUB TAG   an identity provider that lets everybody in as SUB
    dirac-server.py tls PORT TO DIR KIND      a way in with a certificate: good, expired, of another host
    dirac-server.py keys DIR ISSUER           keys and day-long tokens, into DIR
    dirac-server.py mint DIR ISSUER USER MIN  an access token, signed with the server's own key
    dirac-server.py login URL                 a login by the device flow; prints the credentials
"""
import base64
import hashlib
import hmac
import json
import re
import secrets
import sys
import time
import urllib.parse
import urllib.request
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STORE_KEY, STORE_SECRET = "bed", "bed-secret"

# name: (group, subject, user name, properties)
USERS = {
    "ci-robot": ("user", "robot-sub", "ci-robot", ["NormalUser"]),
    "other": ("user", "other-sub", "other", ["NormalUser"]),
    "pilot": ("pilot", "admin-sub", "wmsadmin", ["GenericPilot"]),
    "admin": ("admin", "admin-sub", "wmsadmin", ["NormalUser", "JobAdministrator", "ServiceAdministrator"]),
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60

    def log_message(self, *_):
        pass

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status, body=b"", kind="application/json", **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def signing_key(credential):
    """Derives the signing key of a scope KEY/DATE/REGION/SERVICE/aws4_request."""
    key = ("AWS4" + STORE_SECRET).encode()
    for part in credential.split("/")[1:]:
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return key


def refusal(fields, content, bucket):
    """Says why a real store would refuse a form: forged, too late, or not what was announced."""
    good = hmac.new(signing_key(fields["x-amz-credential"]), fields["policy"].encode(), hashlib.sha256)
    if not hmac.compare_digest(good.hexdigest(), fields["x-amz-signature"]):
        return 403, "SignatureDoesNotMatch"
    policy = json.loads(base64.b64decode(fields["policy"]))
    if datetime.fromisoformat(policy["expiration"].replace("Z", "+00:00")) < datetime.now(timezone.utc):
        return 403, "AccessDenied"
    named = {**fields, "bucket": bucket}
    for rule in policy["conditions"]:
        if isinstance(rule, list):
            if not rule[1] <= len(content) <= rule[2]:
                return 400, "EntityTooLarge"
        elif any(named.get(name.lower()) != value for name, value in rule.items()):
            return 403, "AccessDenied"
    wanted = fields.get("x-amz-checksum-sha256")
    if wanted and base64.b64encode(hashlib.sha256(content).digest()).decode() != wanted:
        return 400, "BadDigest"
    return None


def s3(port, root):
    """Buckets are folders; objects are files named by the hash of their key."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)

    class S3(Handler):
        def where(self):
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            bucket, _, key = path.lstrip("/").partition("/")
            return root / bucket, key

        def error(self, status, code):
            self.answer(status, f"<Error><Code>{code}</Code></Error>".encode(), "application/xml")

        @staticmethod
        def file(bucket, key):
            return bucket / hashlib.sha256(key.encode()).hexdigest()

        def do_GET(self):
            bucket, key = self.where()
            if not bucket.is_dir():
                self.error(404, "NoSuchBucket")
            elif not key:  # "/" as well: somebody asks whether the store is up
                self.answer(200, b"", "application/xml")
            elif not self.file(bucket, key).is_file():
                self.error(404, "NoSuchKey")
            else:
                self.answer(200, self.file(bucket, key).read_bytes(), "application/octet-stream")

        do_HEAD = do_GET

        def do_PUT(self):
            bucket, key = self.where()
            content = self.body()
            bucket.mkdir(exist_ok=True)
            if key:
                self.file(bucket, key).write_bytes(content)
            self.answer(200)

        def do_DELETE(self):
            bucket, key = self.where()
            self.file(bucket, key).unlink(missing_ok=True)
            self.answer(204)

        def do_POST(self):
            bucket, _ = self.where()
            body = self.body()
            if urllib.parse.urlsplit(self.path).query.startswith("delete"):
                for key in re.findall(rb"<Key>(.*?)</Key>", body):
                    self.file(bucket, key.decode()).unlink(missing_ok=True)
                return self.answer(200, b"<DeleteResult/>", "application/xml")
            head = b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n"
            fields, content = {}, None
            for part in BytesParser().parsebytes(head + body).get_payload():
                name = part.get_param("name", header="content-disposition")
                if name == "file":
                    content = part.get_payload(decode=True)
                else:
                    fields[name.lower()] = part.get_payload(decode=True).decode()
            if content is None:
                return self.error(400, "InvalidArgument")
            try:
                refused = refusal(fields, content, bucket.name)
            except KeyError:
                refused = 403, "AccessDenied"
            if refused:
                return self.error(*refused)
            target = self.file(bucket, fields["key"])
            aside = target.with_suffix("." + secrets.token_hex(4))
            aside.write_bytes(content)
            aside.rename(target)
            self.answer(204)

    Server(("127.0.0.1", int(port)), S3).serve_forever()


def idp(port, client, subject, _tag):
    from joserfc import jwt
    from joserfc.jwk import RSAKey

    base = f"http://127.0.0.1:{port}"
    key = RSAKey.generate_key(2048, parameters={"kid": "bed", "alg": "RS256", "use": "sig"})
    challenges = {}

    class Provider(Handler):
        def do_GET(self):
            url = urllib.parse.urlsplit(self.path)
            query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query).items()}
            if url.path == "/.well-known/openid-configuration":
                self.answer(200, {
                    "issuer": base, "authorization_endpoint": base + "/authorize",
                    "token_endpoint": base + "/token", "jwks_uri": base + "/jwks",
                    "response_types_supported": ["code"], "subject_types_supported": ["public"],
                    "id_token_signing_alg_values_supported": ["RS256"]})
            elif url.path == "/jwks":
                self.answer(200, {"keys": [key.as_dict(private=False)]})
            elif url.path == "/authorize":
                code = secrets.token_urlsafe(16)
                challenges[code] = query["code_challenge"]
                back = urllib.parse.urlencode({"code": code, "state": query["state"]})
                self.answer(302, Location=f"{query['redirect_uri']}?{back}")
            else:
                self.answer(404, {})

        def do_POST(self):
            form = {k: v[0] for k, v in urllib.parse.parse_qs(self.body().decode()).items()}
            digest = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
            if challenges.pop(form.get("code"), None) != base64.urlsafe_b64encode(digest).decode().rstrip("="):
                return self.answer(400, {"error": "invalid_grant"})
            now = int(time.time())
            claims = {"iss": base, "aud": client, "sub": subject, "iat": now, "exp": now + 600}
            self.answer(200, {"token_type": "Bearer", "access_token": "unused",
                              "id_token": jwt.encode({"alg": "RS256", "kid": "bed"}, claims, key)})

    Server(("127.0.0.1", int(port)), Provider).serve_forever()


def certificates(folder, kind):
    """Makes an authority and a certificate signed by it, as ca.pem and server.pem."""
    import ipaddress
    from datetime import timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.now(timezone.utc)

    def make(name, key, issuer, signer, ends, *extensions):
        builder = x509.CertificateBuilder(
            x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]),
            x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]),
            key.public_key(), x509.random_serial_number(), now - timedelta(days=9), ends)
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    own, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    host = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    if kind == "other":
        host = x509.DNSName("elsewhere.example")
    ends = now + timedelta(days=-1 if kind == "expired" else 9)
    ca = make("bed authority", own, "bed authority", own, now + timedelta(days=9), x509.BasicConstraints(True, None))
    server = make("bed", key, "bed authority", own, ends, x509.SubjectAlternativeName([host]),
                  x509.BasicConstraints(False, None))
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                               serialization.NoEncryption())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ca.pem").write_bytes(ca)
    (folder / "server.pem").write_bytes(server + secret)


def tls(port, to, folder, kind):
    """Passes on what comes through its connections."""
    import asyncio
    import ssl

    folder = Path(folder)
    certificates(folder, kind)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")

    async def pump(reader, writer):
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def serve(reader, writer):
        inner, outer = await asyncio.open_connection("127.0.0.1", int(to))
        await asyncio.gather(pump(reader, outer), pump(inner, writer))

    async def main():
        server = await asyncio.start_server(serve, "127.0.0.1", int(port), ssl=context)
        await server.serve_forever()

    asyncio.run(main())


def token(ring, issuer, user, minutes):
    from joserfc import jwt
    from uuid_utils import uuid7

    group, subject, name, properties = USERS[user]
    key = next(k for k in ring.keys if "sign" in (k.get("key_ops") or []))
    claims = {
        "iss": issuer, "sub": f"testvo:{subject}", "vo": "testvo", "dirac_group": group,
        "preferred_username": name, "dirac_properties": properties, "dirac_policies": {},
        "jti": str(uuid7()), "exp": int(time.time() + float(minutes) * 60)}
    return jwt.encode({"alg": key.get("alg"), "kid": key.get("kid")}, claims, ring, algorithms=["Ed25519"])


def mint(folder, issuer, user, minutes):
    from joserfc.jwk import KeySet

    print(token(KeySet.import_key_set(json.loads(Path(folder, "jwks.json").read_text())), issuer, user, minutes))


def keys(folder, issuer):
    from joserfc.jwk import KeySet, OKPKey

    folder = Path(folder)
    about = {"key_ops": ["sign", "verify"], "alg": "Ed25519", "kid": secrets.token_hex(16)}
    ring = KeySet([OKPKey.generate_key("Ed25519", parameters=about, private=True)])
    (folder / "jwks.json").write_text(json.dumps(ring.as_dict(private=True)))
    raw = secrets.token_bytes(32)
    (folder / "api.key").write_text("diracx:legacy:" + base64.urlsafe_b64encode(raw).decode())
    (folder / "api.hash").write_text(hashlib.sha256(raw).hexdigest())
    (folder / "state.key").write_text(base64.urlsafe_b64encode(secrets.token_bytes(32)).decode())
    for user in USERS:
        path = folder / f"{user}.token"
        path.write_text(token(ring, issuer, user, 24 * 60))
        path.chmod(0o600)


def login(url):
    """Plays both the person and the program."""
    query = urllib.parse.urlencode({"client_id": "myDIRACClientID", "scope": "vo:testvo group:user"})
    ask = urllib.request.Request(f"{url}/api/auth/device?{query}", method="POST")
    with urllib.request.urlopen(ask) as reply:
        flow = json.load(reply)
    urllib.request.urlopen(flow["verification_uri_complete"]).close()
    form = urllib.parse.urlencode({
        "grant_type": "urn:ietf:params:oauth:grant-type:device_code",
        "client_id": "myDIRACClientID", "device_code": flow["device_code"]}).encode()
    with urllib.request.urlopen(f"{url}/api/auth/token", data=form) as reply:
        got = json.load(reply)
    print(json.dumps({
        "access_token": got["access_token"], "refresh_token": got["refresh_token"],
        "expires_on": int(time.time()) + got["expires_in"] - 15}))


def application():
    from diracx.db.os.utils import BaseOSDB
    from diracx.routers.factory import create_app

    real = BaseOSDB.available_implementations

    class InMemory:
        """Stands in for OpenSearch. Nothing that a client can ask for is read from it."""

        documents = {}

        @asynccontextmanager
        async def client_context(self):
            yield

        async def __aenter__(self):
            return self

        async def __aexit__(self, *_):
            pass

        async def ping(self):
            pass

        async def bulk_upsert(self, documents):
            count = 0
            for _, job, values in documents:
                self.documents.setdefault(job, {}).update(values)
                count += 1
            return count, []

    def implementations(name):
        classes = real(name)
        return [type(name, (InMemory, classes[0]), {}), *classes]

    BaseOSDB.available_implementations = staticmethod(implementations)
    app = create_app()

    @asynccontextmanager
    async def tables():
        from diracx.db.__main__ import init_sql
        await init_sql()
        yield

    app.lifetime_functions.append(tables)
    return app


def serve(port, _tag):
    import uvicorn

    uvicorn.run(application(), host="127.0.0.1", port=int(port), access_log=False, timeout_keep_alive=60)


if __name__ == "__main__":
    what = {"s3": s3, "idp": idp, "tls": tls, "keys": keys, "mint": mint, "login": login, "serve": serve}
    what[sys.argv[1]](*sys.argv[2:])
