// pg-boss. See program.mjs for the commands.

import { PgBoss } from "pg-boss";
import { inputEnds, main, pace, ready } from "./program.mjs";

async function withBoss(url, options, use) {
  const boss = new PgBoss({ connectionString: url, ...options });
  boss.on("error", (error) => console.error(`pg-boss: ${error}`));
  await boss.start();
  await use(boss);
  await boss.stop();
}

const client = { supervise: false, schedule: false };

await main({
  prepare: (url) => withBoss(url, client, (boss) => boss.createQueue("noop", { notify: true })),

  enqueue: (url, settings, count) =>
    withBoss(url, client, (boss) => boss.insert("noop", Array.from({ length: count }, (_, n) => ({ data: { n } })))),

  work: (url, settings, starts) =>
    withBoss(url, { useListenNotify: true }, async (boss) => {
      await boss.work("noop", settings, async (jobs) => {
        for (const job of jobs) starts.add(job.data.n);
      });
      ready();
      await inputEnds();
    }),

  produce: (url) => withBoss(url, client, (boss) => pace((n) => boss.send("noop", { n }))),
});
