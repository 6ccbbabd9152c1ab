// Validates objects of the Prometheus operator, a JSON array on standard input, against its schemas.
import { text } from "node:stream/consumers";
import * as models from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1";

for (const object of JSON.parse(await text(process.stdin))) {
  const Model = (models.default ?? models)[object.kind];
  try {
    new Model(object).validate();
  } catch (error) {
    console.error(`${object.kind} ${object.metadata.name}: ${error.message}`);
    process.exitCode = 1;
  }
}
