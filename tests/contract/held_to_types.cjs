// Holds JSON objects to a TypeScript type: node held_to_types.cjs NODE_MODULES FILE-OF-TYPES TYPE < OBJECTS
// Standard input is a JSON list; prints a list as long: what is wrong in each. Unknown keys are wrong.
const { readFileSync } = require("fs");
const { createRequire } = require("module");
const [modules, path, type] = process.argv.slice(2);
const load = createRequire(modules + "/");
const Ajv = load("ajv");
const { createGenerator } = load("ts-json-schema-generator");

const schema = createGenerator({
  path: modules + "/" + path,
  type,
  skipTypeCheck: true,
  additionalProperties: false,
}).createSchema(type);
const validate = new Ajv({ allErrors: true, strict: false }).compile(schema);
const found = JSON.parse(readFileSync(0, "utf8")).map((value) =>
  validate(value) ? [] : validate.errors.map((e) => `${e.instancePath} ${e.message} ${JSON.stringify(e.params)}`),
);
console.log(JSON.stringify(found));
