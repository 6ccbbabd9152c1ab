import type { components } from "@regcred/client";

type Schemas = components["schemas"];
export type Account = Schemas["RegistryAccount"];
export type ApiKey = Schemas["ApiKey"];
export type AuditEvent = Schemas["AuditEvent"];
export type Check = Schemas["Check"];
export type Cluster = Schemas["Cluster"];
export type Explanation = Schemas["Explanation"];
export type FieldProblem = Schemas["FieldProblem"];
export type Grants = Schemas["Grants"];
export type IdentityProvider = Schemas["IdentityProvider"];
export type ImportResult = Schemas["ImportResult"];
export type LookUp = Schemas["LookUp"];
export type Me = Schemas["Me"];
export type MissingRight = Schemas["MissingRight"];
export type PullSecret = Schemas["PullSecret"];
export type PullSecretPreview = Schemas["PullSecretPreview"];
export type PutPullSecret = Schemas["PutPullSecret"];
export type ResourceKind = Schemas["ResourceKind"];
export type Role = Schemas["Role"];
export type Session = Schemas["Session"];
export type Summary = Schemas["Summary"];
export type Target = Schemas["PullSecretTargetStatus"];
export type TargetState = Schemas["TargetState"];
export type VerificationResult = Schemas["VerificationResult"];
export type Warning = Schemas["Warning"];

export type Page<Item> = { items: Item[]; next: string | null };
