"""The site as its readers get it: whole, quiet, searchable, and asking nothing of any other host. `make docs` builds it."""
import ast, html, re
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag, urljoin, urlparse
import pytest
from conftest import lacking

class Links(HTMLParser):
    "What a page names: ids, and the addresses it loads or leads to."
    def __init__(self, text):
        super().__init__()
        self.ids,self.loads,self.leads = set(),[],[]
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        d = {k:v or '' for k,v in attrs}
        self.ids |= {d[k] for k in ('id', 'name') if k in d}
        if tag in ('script', 'img', 'iframe', 'source', 'link') and d.get('rel')!='canonical': self.loads += [d[k] for k in ('src', 'href') if k in d]
        elif tag=='a' and 'href' in d: self.leads.append(d['href'])

@pytest.fixture(scope='module')
def pages(site):
    "Each page by its path in the site."
    return {f.relative_to(site).as_posix(): Links(f.read_text(encoding='utf-8')) for f in site.rglob('*.html') if f.name!='404.html'}

def test_every_notebook_has_its_page(pages, root):
    books = [f.relative_to(root/'nbs') for f in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts]
    assert set(pages)=={f.with_name(re.sub(r'^\d+_', '', f.stem)+'.html').as_posix() for f in books}

def test_pages_load_nothing_from_elsewhere(pages):
    far = {(p, u) for p,page in pages.items() for u in page.loads if urlparse(u).netloc}
    assert not far

def test_links_and_scripts_exist(pages, site):
    broken = []
    for p,page in pages.items():
        for u in page.loads+page.leads:
            if urlparse(u).scheme: continue
            path,frag = urldefrag(unquote(urljoin(p, u)))
            path = path.strip('/') or 'index.html'
            if not (site/path).is_file(): broken.append(f'{p} names {u}')
            elif frag and path in pages and frag not in pages[path].ids: broken.append(f'{p} names {u}, and there is no such place')
    assert not broken, '\n'.join(broken)

def test_every_public_name_has_its_place(pages):
    from stateset_nb._modidx import d
    addresses = [a for room,syms in d['syms'].items() for s,(a,_) in syms.items() if '.' not in (n := s.removeprefix(room+'.')) and n[0]!='_']
    lost = [a for a in addresses if a.split('#')[1] not in pages[a.split('#')[0]].ids]
    assert addresses and not lost

def test_a_page_holds_the_code_of_its_module(site, root):
    for f in (root/'stateset_nb').glob('[a-z]*.py'):
        text = html.unescape(re.sub(r'<[^>]*>', '', (site/f'{f.stem}.html').read_text(encoding='utf-8')))
        names = [n.name for n in ast.parse(f.read_text(encoding='utf-8')).body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
        lost = [n for n in names if not re.search(rf'\b(def|class) {n}\b', text)]
        assert names and not lost

@pytest.fixture
def page(chromium):
    "A browser's page that remembers what it asked for and what it complained about."
    context = chromium.new_context(color_scheme='light', viewport={'width':1360, 'height':900})
    pg = context.new_page()
    pg.asked,pg.said = [],[]
    pg.on('request', lambda r: pg.asked.append(r.url))
    pg.on('console', lambda m: pg.said.append(m.text) if m.type in ('error', 'warning') else None)
    pg.on('pageerror', lambda e: pg.said.append(str(e)))
    pg.on('response', lambda r: pg.said.append(f'{r.status} {r.url}') if r.status>=400 else None)
    yield pg
    context.close()

def test_a_reader_walks_through_quietly(page, pages, served):
    "No page asks another host for anything, and none has an error to report."
    for p in pages: page.goto(served+p, wait_until='load')
    assert len(page.asked)>len(pages) and not [u for u in page.asked if not u.startswith((served, 'data:', 'blob:'))]
    assert not page.said

def test_search_finds_a_function(page, served):
    page.goto(served)
    page.keyboard.press('/')
    page.keyboard.type('group_advantages', delay=10)
    found = page.locator('.md-search-result__link')
    found.first.wait_for(timeout=20_000)
    assert any(re.search(r'/grpo\.html(\?h=\w*)?#group_advantages$', a.get_attribute('href')) for a in found.all())
    assert not [u for u in page.asked if not u.startswith((served, 'data:', 'blob:'))]

def test_an_api_anchor_leads_to_its_signature(page, served):
    page.goto(served+'grpo.html#group_advantages')
    head = page.locator('[id=group_advantages]')
    assert head.is_visible() and 0<=head.bounding_box()['y']<400
    assert 'def group_advantages(' in head.locator('xpath=following::pre[1]').inner_text()
    source = page.locator('[id=group_advantages] ~ details.source').first
    source.locator('summary').click()
    assert 'return' in source.locator('pre').inner_text()

def test_formulas_are_drawn(page, served, site):
    if not (site/'vendor'/'tex-svg.js').exists(): lacking('the site was built without npm, so without MathJax: formulas stay as text')
    page.goto(served+'grpo.html')
    page.locator('.arithmatex mjx-container svg').first.wait_for(timeout=20_000)
    assert page.locator('.arithmatex').count()==page.locator('.arithmatex mjx-container').count()>0
    assert page.locator('[data-mjx-error], merror').count()==0

def test_plots_are_seen(page, served):
    page.goto(served+'stats.html')
    plots = page.locator('img.plot')
    assert plots.count()>0
    for img in plots.all():
        img.scroll_into_view_if_needed()
        assert img.evaluate('i => i.complete && i.naturalWidth > 100')

def test_sidebar_has_the_floors_in_order(page, served):
    page.goto(served)
    floors = [t.strip() for t in page.locator('.md-sidebar--primary .md-nav__item--section > .md-nav__link').all_inner_texts()]
    assert [f for f in floors if f!='Tutorials']==['Speak', 'Remember', 'Value', 'Learn', 'Judge', 'Run']

def test_the_reader_may_turn_the_light_off(page, served):
    page.goto(served)
    assert page.locator('body').get_attribute('data-md-color-scheme')=='default'
    page.locator('label[title=Dark]').click()
    assert page.locator('body').get_attribute('data-md-color-scheme')=='slate'
