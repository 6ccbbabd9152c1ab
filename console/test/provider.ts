import { generateKeyPairSync } from "node:crypto";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import Provider from "oidc-provider";

export const CLIENT = { clientId: "regcred console", clientSecret: "a secret with +/=&% in it" };

/** Groups of the people of the provider; others have none. */
const GROUPS: Record<string, string[]> = { lena: ["dev"], olga: ["dev", "ops"] };

/** A real provider of OpenID Connect, with a page where people sign in with any password. */
export interface RunningProvider {
  issuer: string;
  close: () => void;
}

/** Starts a provider whose client may return to an address. For browsers, `localhost` is another site than 127.0.0.1. */
export async function startProvider(redirectUri: string): Promise<RunningProvider> {
  const server = createServer();
  await new Promise<void>((listening) => server.listen(0, "127.0.0.1", listening));
  const issuer = `http://localhost:${(server.address() as AddressInfo).port}`;
  const { privateKey } = generateKeyPairSync("rsa", { modulusLength: 2048 });
  const provider = new Provider(issuer, {
    clients: [{ client_id: CLIENT.clientId, client_secret: CLIENT.clientSecret, redirect_uris: [redirectUri], grant_types: ["authorization_code"] }],
    jwks: { keys: [{ ...privateKey.export({ format: "jwk" }), kid: "one", use: "sig", alg: "RS256" }] },
    cookies: { keys: ["of a test"] },
    pkce: { required: () => true },
    // As most providers do: claims of granted scopes are in the ID token.
    conformIdTokenClaims: false,
    claims: { openid: ["sub", "groups"], profile: ["name"], email: ["email", "email_verified"] },
    findAccount: (_context: unknown, id: string) => ({
      accountId: id,
      claims: () => ({ sub: id, groups: GROUPS[id] ?? [], email: `${id}@example.com`, email_verified: true }),
    }),
  });
  server.on("request", provider.callback());
  return { issuer, close: () => server.close() };
}
