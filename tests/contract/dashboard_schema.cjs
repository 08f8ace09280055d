// Holds dashboards to the types that Grafana itself is made of: node dashboard_schema.cjs NODE_MODULES FILE...
// Prints one JSON object: file -> what is wrong in it. The types are TypeScript's; a generator makes JSON Schema of them.
const { readFileSync } = require("fs");
const { createRequire } = require("module");
const [modules, ...files] = process.argv.slice(2);
const load = createRequire(modules + "/");
const Ajv = load("ajv");
const { createGenerator } = load("ts-json-schema-generator");

const RAW = modules + "/@grafana/schema/dist/esm/raw/";
const PANEL = (type, name) => `${RAW}composable/${type}/panelcfg/x/${name}PanelCfg_types.gen.d.ts`;
const PANELS = {
  bargauge: PANEL("bargauge", "BarGauge"),
  stat: PANEL("stat", "Stat"),
  table: PANEL("table", "Table"),
  timeseries: PANEL("timeseries", "TimeSeries"),
};
const ajv = new Ajv({ allErrors: true, strict: false });

function validator(path, type) {
  const schema = createGenerator({ path, type, skipTypeCheck: true, additionalProperties: false }).createSchema(type);
  return ajv.compile(schema);
}

const dashboard = validator(RAW + "dashboard/x/dashboard_types.gen.d.ts", "Dashboard");
const options = Object.fromEntries(Object.entries(PANELS).map(([name, path]) => [name, validator(path, "Options")]));
const custom = {
  table: validator(PANELS.table, "FieldConfig"),
  timeseries: validator(PANELS.timeseries, "FieldConfig"),
};
const found = {};
for (const file of files) {
  const content = JSON.parse(readFileSync(file, "utf8"));
  const wrong = (found[file] = []);
  const check = (validate, value, where) => {
    if (!validate(value)) {
      for (const e of validate.errors) wrong.push(`${where}${e.instancePath} ${e.message} ${JSON.stringify(e.params)}`);
    }
  };
  check(dashboard, content, "");
  content.panels.forEach((panel, index) => {
    if (!(panel.type in options)) wrong.push(`panels/${index}: no types for panels of type ${panel.type}`);
    else check(options[panel.type], panel.options, `panels/${index}/options`);
    const own = panel.fieldConfig?.defaults?.custom;
    if (own !== undefined && panel.type in custom) check(custom[panel.type], own, `panels/${index}/custom`);
  });
}
console.log(JSON.stringify(found));
